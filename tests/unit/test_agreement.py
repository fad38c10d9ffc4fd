"""The table of who has what."""

from horovod_owt.train.agreement import differences
from horovod_owt.versions import code_digest


def test_what_all_have_is_not_in_it():
    assert differences([("h0", {"version torch": "2"}), ("h1", {"version torch": "2"})]) == []


def test_each_value_has_its_ranks_and_a_missing_one_is_none():
    everyone = [(f"h{rank // 2}", {"version torch": "2", "version dali": "1"}) for rank in range(6)]
    everyone[3][1]["version torch"] = "3"
    del everyone[5][1]["version dali"]
    assert differences(everyone) == [
        "version torch  2: ranks 0 (h0), 1 (h0), 2 (h1), 4 (h2) and 1 more",
        "               3: rank 3 (h1)",
        "version dali  1: ranks 0 (h0), 1 (h0), 2 (h1), 3 (h1) and 1 more",
        "              none: rank 5 (h2)",
    ]


def test_the_code_digest_sees_content_names_and_recipes(tmp_path):
    seen = set()
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", "y"), ("c.yaml", "y"), ("c.yaml", "z")):
        (tmp_path / name).write_text(text)
        seen.add(code_digest(tmp_path))
    (tmp_path / "note.txt").write_text("not code")
    seen.add(code_digest(tmp_path))
    assert len(seen) == 5
