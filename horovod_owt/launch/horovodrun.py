"""horovodrun, whose ssh ends when its host is gone: by itself it waits for ever for one without power.

python -m horovod_owt.launch.horovodrun OPTIONS OF HOROVODRUN
"""

ALIVE = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s without an answer


def main() -> None:
    from horovod.runner import launch
    from horovod.runner.util import remote

    remote.SSH_COMMAND_PREFIX += f" {ALIVE}"
    launch.run_commandline()


if __name__ == "__main__":
    main()
