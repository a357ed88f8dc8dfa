"""Records survive whatever ends their writer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.data.origins.journal import Journal, kept


def test_a_line_that_was_cut_off_counts_as_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x" / "fetched.jsonl"
    assert list(Journal(path).records()) == []
    for number in range(3):
        Journal(path).add({"row": number})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        Journal(path).add({"row": 9})
        rows = [record["row"] for record in Journal(path).records()]
        assert rows == [*range(len(rows) - 1), 9]


def test_threads_may_share_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "fetched.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: journal.add({"row": number}), range(200)))
    assert sorted(record["row"] for record in journal.records()) == list(range(200))


def test_a_folder_is_named_by_what_decides_its_content_and_holds_no_password(tmp_path: Path) -> None:
    names = []
    for name, revision in (("ftp://me:secret@host/rex", None), ("ftp://me:secret@host/rex", "v1"), ("a/b", None)):
        with kept(tmp_path, "mirrors", name, revision) as (folder, _):
            names.append(folder.name)
    assert len(set(names)) == 3 and names[0].startswith("ftp-host-rex-") and not any("secret" in name for name in names)
