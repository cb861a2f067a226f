"""Archives: the same bytes each time; what is not a plain file under a plain name is refused."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import LoadError
from handler.packaging.archive import Limits, Member, extract, read_archive, write_archive

FILES = {"serving.properties": b"engine=Python\n", "handler/model.py": b"x = 1\n" * 500}


def members(files: dict[str, bytes]) -> list[Member]:
    return [Member.of_bytes(name, content) for name, content in files.items()]


def tar_gz(path: Path, *entries: tarfile.TarInfo, level: int = 1) -> Path:
    """An archive of these entries as they are, each of its declared size in zeros."""
    with gzip.open(path, "wb", level) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)) if entry.isreg() else None)
    return path


def entry(
    name: str, size: int = 3, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size if kind == tarfile.REGTYPE else 0, kind, link
    return info


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written: list[int] = []
    write_archive(tmp_path / "a.tar.gz", members(FILES), written.append)
    assert sum(written) == sum(map(len, FILES.values()))
    sizes = extract(tmp_path / "a.tar.gz", tmp_path / "out")
    assert sizes == {name: len(content) for name, content in FILES.items()}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == FILES
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "out"}


def test_the_same_members_make_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    outputs = [tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"]
    for moment, output in enumerate(outputs, 1):
        source.write_bytes(b"w" * 3_000_000)
        source.chmod(0o600 + moment)
        os.utime(source, (moment, moment))
        write_archive(output, [*members(FILES), Member.of_file("weights", source)])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_other_programs_read_it(tmp_path: Path) -> None:
    long_name = "/".join(["folder"] * 40) + "/file"
    output = tmp_path / "a.tar.gz"
    write_archive(output, members({**FILES, long_name: b"1"}))
    listed = subprocess.run(["tar", "tzvf", output], check=True, capture_output=True, text=True)
    lines = listed.stdout.splitlines()
    assert [line.split()[-1] for line in lines] == [*FILES, long_name]
    assert all(line.startswith("-rw-r--r-- 0/0 ") for line in lines)


def test_the_archive_has_the_mode_that_new_files_have(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    write_archive(tmp_path / "a.tar.gz", members(FILES))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "a.tar.gz")}
    assert len(modes) == 1


def test_a_file_that_shrinks_meanwhile_leaves_the_older_archive(tmp_path: Path) -> None:
    output = tmp_path / "a.tar.gz"
    output.write_bytes(b"older")
    with pytest.raises(LoadError, match="weights became shorter while it was read"):
        write_archive(output, [Member("weights", 10, lambda: [b"12345"])])
    assert output.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"12345")
    member = Member.of_file("weights", file)
    file.write_bytes(b"123456")
    with pytest.raises(LoadError, match="weights became longer while it was read"):
        write_archive(tmp_path / "a.tar.gz", [member])
    file.write_bytes(b"54321")
    os.utime(file, ns=(0, 0))
    with pytest.raises(LoadError, match="weights has changed while it was read"):
        write_archive(tmp_path / "a.tar.gz", [member])
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"cannot write .*: No such file.*choose another output"):
        write_archive(tmp_path / "none" / "a.tar.gz", members(FILES))


def test_only_what_is_wanted_is_unpacked(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.tar.gz", members(FILES))
    sizes = extract(tmp_path / "a.tar.gz", tmp_path / "out", wanted=lambda n: n.endswith(".py"))
    assert set(sizes) == set(FILES)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["handler"]


def test_a_leading_dot_and_folders_are_let_through(tmp_path: Path) -> None:
    """As ``tar czf model.tar.gz -C folder .`` makes it."""
    for name, content in FILES.items():
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    archive = tmp_path / "a.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", tmp_path / "in", "."], check=True)
    assert {name for name, _, _ in read_archive(archive)} == set(FILES)


REFUSED = {
    "absolute": (entry("/etc/passwd"), "'/etc/passwd' is an absolute path"),
    "parent": (entry("../x"), "'../x' has \"..\" in its name, which DJLServing refuses"),
    "inner parent": (entry("a/../../x"), 'has ".." in its name'),
    "two dots": (entry("a..b"), 'has ".." in its name'),
    "symbolic link": (
        entry("x", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        "'x' is a symbolic link",
    ),
    "link inside": (entry("x", kind=tarfile.SYMTYPE, link="y"), "'x' is a symbolic link"),
    "hard link": (entry("x", kind=tarfile.LNKTYPE, link="y"), "'x' is a hard link"),
    "pipe": (entry("x", kind=tarfile.FIFOTYPE), "'x' is a device or a pipe"),
    "device": (entry("x", kind=tarfile.CHRTYPE), "'x' is a device or a pipe"),
    "disk": (entry("x", kind=tarfile.BLKTYPE), "'x' is a device or a pipe"),
    "other kind": (entry("x", kind=b"Z"), "'x' is of the unknown kind b'Z'"),
    "newline": (entry("a\nb"), "'a\\nb' has control characters"),
    "escape": (entry("a\x1b[2J"), "has control characters or backslashes"),
    "backslash": (entry("a\\b"), "has control characters or backslashes"),
    "bytes": (entry("a\udcff"), "has control characters or backslashes"),
    "no name": (entry("./."), "has no name"),
}


@pytest.mark.parametrize(("bad", "words"), REFUSED.values(), ids=REFUSED)
def test_members_that_are_refused(tmp_path: Path, bad: tarfile.TarInfo, words: str) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", entry("good"), bad)
    with pytest.raises(LoadError) as refused:
        extract(archive, tmp_path / "sub" / "out")
    assert words in str(refused.value)
    assert not list((tmp_path / "sub").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "sub"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "./a"], "'a' is there twice"),
        (["a", "a/b"], "'a' is a file and a folder"),
        (["a/b", "a"], "'a' is there twice"),
    ],
)
def test_names_that_collide(tmp_path: Path, names: list[str], words: str) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", *map(entry, names))
    with pytest.raises(LoadError, match=words):
        extract(archive, tmp_path / "out")


def test_a_sparse_file(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as stream:
        stream.truncate(1 << 32)
    archive = tmp_path / "a.tar.gz"
    subprocess.run(["tar", "czSf", archive, "-C", tmp_path, "holes"], check=True)
    with pytest.raises(LoadError, match="'holes' is a sparse file"):
        list(read_archive(archive))


def test_sizes_and_numbers_are_limited(tmp_path: Path) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", *(entry(str(n), 1 << 20) for n in range(3)))
    with pytest.raises(LoadError, match="more than 2 members"):
        list(read_archive(archive, Limits(members=2)))
    with pytest.raises(LoadError, match="'2' has 1048576 bytes, more than the 3000000"):
        list(read_archive(archive, Limits(bytes=3_000_000)))


def test_a_declared_size_without_the_bytes(tmp_path: Path) -> None:
    header = entry("x", 1 << 42).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header))
    with pytest.raises(LoadError, match="'x' has 4398046511104 bytes, more than"):
        list(read_archive(tmp_path / "a.tar.gz"))


def test_a_bomb(tmp_path: Path) -> None:
    """Zeros shrink a thousandfold, weights hardly."""
    squeeze, zeros = zlib.compressobj(1, wbits=31), bytes(1 << 24)
    start = squeeze.compress(entry("x", 2 << 30).tobuf(tarfile.GNU_FORMAT))
    start += squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(zeros) + squeeze.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.tar.gz").write_bytes(start + 80 * block)
    with pytest.raises(LoadError, match="unpacks to more than 200 times its"):
        list(read_archive(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_in_a_header(tmp_path: Path, kind: bytes) -> None:
    """tarfile would read it into memory as a whole."""
    info = entry("x")
    info.type, info.size = kind, 1 << 33
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(LoadError, match="has a header of 8589934592 bytes"):
        list(read_archive(tmp_path / "a.tar.gz"))


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    write_archive(tmp_path / "a.tar.gz", members(FILES))
    return (tmp_path / "a.tar.gz").read_bytes()


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_file_that_is_cut_off(tmp_path: Path, content: bytes, kept: int) -> None:
    (tmp_path / "cut").write_bytes(content[:kept])
    with pytest.raises(LoadError, match="cut is cut off: copy or download it again"):
        extract(tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_archive(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for no_archive in (b"PK\3\4 a zip" * 99, gzip.compress(b"no tar " * 300), gzip.compress(b"")):
        file.write_bytes(no_archive)
        with pytest.raises(LoadError, match="is damaged, or no"):
            list(read_archive(file))
    with pytest.raises(LoadError, match="cannot be read: No such file"):
        list(read_archive(tmp_path / "none"))
    with pytest.raises(LoadError, match="cannot be read: Is a directory"):
        list(read_archive(tmp_path))


def test_a_second_gzip_stream(tmp_path: Path, content: bytes) -> None:
    """DJLServing would not read it."""
    (tmp_path / "two").write_bytes(content + gzip.compress(b"more"))
    with pytest.raises(LoadError, match="several gzip streams one behind the other"):
        list(read_archive(tmp_path / "two"))


def test_a_tar_without_its_end_or_with_more_behind_it(tmp_path: Path, content: bytes) -> None:
    tar = gzip.decompress(content)
    for damaged, words in (
        (tar[: tar.rindex(b"x = 1")], "cut off"),
        (tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512), "its end is missing"),
        (tar + b"more", "something follows"),
    ):
        (tmp_path / "damaged").write_bytes(gzip.compress(damaged))
        with pytest.raises(LoadError, match=words):
            extract(tmp_path / "damaged", tmp_path / "out")


@given(seed=st.integers(0, 2**32), inside=st.booleans())
def test_any_damage_is_told_or_harms_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, inside: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write_archive(folder / "a", members(FILES))
    content = (folder / "a").read_bytes()
    damaged = bytearray(gzip.decompress(content) if inside else content)
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(min(len(damaged), 2048))] = chance.randrange(256)
    (folder / "a").write_bytes(gzip.compress(bytes(damaged)) if inside else bytes(damaged))
    try:
        sizes = extract(folder / "a", folder / "out")
    except LoadError as error:
        assert str(folder / "a") in str(error)  # noqa: PT017
    else:
        assert sum(sizes.values()) < 10_000
    assert {p.name for p in folder.iterdir()} <= {"a", "out"}


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(LoadError, match="cannot unpack "):
        extract(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
