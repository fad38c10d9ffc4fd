from horovod_owt.cli import main

main()
