"""`nnlib.data` against the real files (where `NNLIB_DATA` holds them) and against a server that misbehaves."""

import gzip
import hashlib
import io
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnlib import data

REAL = os.environ.get("NNLIB_DATA")
CONTENT = bytes(range(256)) * 1024  # 256 KiB, the good file
WRONG = CONTENT[::-1]


def sha256(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers` (the last one again and again), and counts them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.waits = ["good"], 0, []
        self.gate = threading.Event()  # holds a stalled answer
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        self.content = CONTENT


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers
        answer = answers[min(self.server.requests, len(answers) - 1)]
        self.server.requests += 1
        if isinstance(answer, int):
            return self.send_error(answer)
        while answer == "together" and self.server.requests < 2:
            time.sleep(0.02)
        good = self.server.content
        half = good[: len(good) // 2]
        body = {"good": good, "together": good, "wrong": WRONG}.get(answer, half)
        self.send_response(200)
        if answer != "unsized":  # without a length, a cut connection looks like the end of the file
            promised = good if answer in ("broken", "stalled") else body
            self.send_header("Content-Length", str(len(promised)))
        self.end_headers()
        self.wfile.write(body)
        if answer == "stalled":
            self.wfile.flush()
            self.server.gate.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server for the registered file `test/file`, kept in `tmp_path`; waits are noted, not waited."""
    server = Server()
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    monkeypatch.setitem(data.REGISTRY, "test/file", data.Source(server.url, sha256(CONTENT)))
    monkeypatch.setenv("NNLIB_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "time", SimpleNamespace(sleep=server.waits.append))
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


def files(root):
    return sorted(
        str(p.relative_to(root))
        for p in Path(root).rglob("*")
        if not p.is_dir() or p.name.startswith(".")
    )


def test_a_good_file_is_downloaded_once(server, tmp_path):
    path = data.fetch("test/file")
    assert path == tmp_path / "test/file" and path.read_bytes() == CONTENT
    assert data.fetch("test/file") == path
    assert server.requests == 1 and files(tmp_path) == ["test/file"]


@pytest.mark.parametrize("fault", ["truncated", "broken", "unsized", "wrong", 503, 429, 500])
def test_a_fault_is_followed_by_another_attempt(server, tmp_path, fault):
    server.answers = [fault, "good"]
    assert data.fetch("test/file").read_bytes() == CONTENT
    assert server.requests == 2 and files(tmp_path) == ["test/file"]


@pytest.mark.parametrize("fault", ["truncated", "broken", "unsized", "wrong", 503])
def test_a_lasting_fault_leaves_no_file_and_says_what_to_do(server, tmp_path, fault):
    server.answers = [fault]
    with pytest.raises(data.DataError) as caught:
        data.fetch("test/file")
    assert server.requests == 4 and server.waits == [1.0, 2.0, 4.0] and files(tmp_path) == []
    for part in (
        "data file test/file is missing",
        server.url,
        f"as {tmp_path / 'test/file'}",
        "NNLIB_DATA",
    ):
        assert part in str(caught.value)
    if fault == "wrong":
        assert sha256(WRONG)[7:] in str(caught.value) and sha256(CONTENT)[7:] in str(caught.value)


def test_a_stalled_connection_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.2)
    server.answers = ["stalled", "good"]
    assert data.fetch("test/file").read_bytes() == CONTENT
    assert server.requests == 2 and files(tmp_path) == ["test/file"]


def test_an_address_that_is_gone_is_asked_once(server, tmp_path):
    server.answers = [404]
    with pytest.raises(data.DataError, match="404"):
        data.fetch("test/file")
    assert server.requests == 1 and files(tmp_path) == []


def test_no_network_is_a_clear_error(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        data.DataError,
        match=r"is missing, and its download failed: ConnectionError\. Without a net",
    ):
        data.fetch("test/file")
    assert files(tmp_path) == []


def test_a_damaged_file_is_replaced(server, tmp_path):
    path = tmp_path / "test/file"
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1])
    assert data.fetch("test/file") == path and path.read_bytes() == CONTENT
    assert server.requests == 1 and files(tmp_path) == ["test/file"]


def test_a_damaged_file_that_cannot_be_replaced_is_never_returned(server, tmp_path):
    path = tmp_path / "test/file"
    path.parent.mkdir()
    path.write_bytes(WRONG)
    server.answers = [503]
    with pytest.raises(
        data.DataError,
        match=rf"test/file is damaged \(its sha256 is {sha256(WRONG)[7:]} instead of",
    ):
        data.fetch("test/file")
    assert path.read_bytes() == WRONG and files(tmp_path) == ["test/file"]


def test_a_folder_in_the_place_of_a_file_is_a_clear_error(server, tmp_path):
    (tmp_path / "test/file").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"is damaged \(it cannot be read: Is a directory\)"):
        data.fetch("test/file")


@pytest.fixture
def read_only(server, monkeypatch):
    """A folder that may not be written, not even by root, who takes another user's rights for the test."""
    with (
        tempfile.TemporaryDirectory() as name
    ):  # tmp_path lies in a folder that other users cannot enter
        folder = Path(name)
        (folder / "test").mkdir()
        monkeypatch.setenv("NNLIB_DATA", name)
        root = os.geteuid() == 0

        def lock():
            for path in (folder / "test", folder):
                path.chmod(0o555)
            if root:
                os.seteuid(65534)

        try:
            yield SimpleNamespace(folder=folder, lock=lock)
        finally:
            if root:
                os.seteuid(0)
            for path in (folder, folder / "test"):
                path.chmod(0o755)


def test_a_read_only_folder_serves_what_it_holds(server, read_only):
    (read_only.folder / "test/file").write_bytes(CONTENT)
    read_only.lock()
    assert data.fetch("test/file").read_bytes() == CONTENT
    assert server.requests == 0 and files(read_only.folder) == ["test/file"]


@pytest.mark.parametrize("held, state", [(None, "is missing"), (WRONG, "is damaged")])
def test_a_read_only_folder_without_the_file_is_a_clear_error(server, read_only, held, state):
    if held:
        (read_only.folder / "test/file").write_bytes(held)
    read_only.lock()
    with pytest.raises(data.DataError) as caught:
        data.fetch("test/file")
    assert f"data file test/file {state}" in str(caught.value)
    assert f"{read_only.folder / 'test'} cannot be written (Permission denied)" in str(caught.value)
    assert server.requests == 0


def test_the_hash_of_a_gzipped_file_is_that_of_its_content(server, tmp_path, monkeypatch):
    monkeypatch.setitem(
        data.REGISTRY, "test/file", data.Source(server.url, sha256(CONTENT), gzipped=True)
    )
    packed = gzip.compress(CONTENT)
    for server.content in (packed[:-50] + bytes(50), packed[:1000], WRONG, gzip.compress(WRONG)):
        with pytest.raises(data.DataError, match="what came is not"):
            data.fetch("test/file")
        assert files(tmp_path) == []
    server.content = packed
    assert data.fetch("test/file").read_bytes() == CONTENT and files(tmp_path) == ["test/file"]


FETCH = """
import sys
from nnlib import data
data.REGISTRY["test/file"] = data.Source(sys.argv[1], sys.argv[2])
print([m for m in ("sklearn", "scipy", "pandas", "requests") if m in sys.modules])
print(data.fetch("test/file"))
"""


def start_fetch(server):
    command = [sys.executable, "-W", "error", "-c", FETCH, server.url, sha256(CONTENT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_download_leaves_nothing(server, tmp_path):
    server.answers = ["stalled"]
    process = start_fetch(server)
    half_written = lambda: any(p.stat().st_size for p in tmp_path.rglob("download"))  # noqa: E731
    deadline = time.monotonic() + 60
    while not half_written() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert half_written()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert files(tmp_path) == []
    server.answers = ["good"]
    assert data.fetch("test/file").read_bytes() == CONTENT


def test_a_killed_download_is_not_taken_for_the_file(server, tmp_path):
    (tmp_path / "test/.part-abc").mkdir(
        parents=True
    )  # what a process leaves that could not clean up
    (tmp_path / "test/.part-abc/download").write_bytes(CONTENT[:1000])
    assert data.fetch("test/file").read_bytes() == CONTENT and server.requests == 1


def test_two_processes_may_fetch_the_same_file_at_once(server, tmp_path):
    server.answers = ["together"]
    processes = [start_fetch(server), start_fetch(server)]
    results = [process.communicate(timeout=120) for process in processes]
    # Importing nnlib.data loaded no heavy package, and a pipe shows no progress bar.
    assert results == [(f"[]\n{tmp_path / 'test/file'}\n", "")] * 2
    assert server.requests == 2
    assert (tmp_path / "test/file").read_bytes() == CONTENT and files(tmp_path) == ["test/file"]


def test_a_terminal_shows_a_progress_bar_and_a_pipe_does_not(server, monkeypatch, tmp_path):
    outputs = []
    for is_terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda answer=is_terminal: answer
        monkeypatch.setattr(sys, "stderr", stream)
        data.fetch("test/file").unlink()
        outputs.append(stream.getvalue())
    assert outputs[0] == "" and "test/file:" in outputs[1]


def test_the_folder_is_the_variable_or_the_cache(monkeypatch):
    monkeypatch.setenv("NNLIB_DATA", "~/somewhere")
    assert data.folder() == Path.home() / "somewhere"
    monkeypatch.setenv("NNLIB_DATA", "")
    assert data.folder().is_absolute() and "nnlib" in data.folder().parts


@pytest.mark.parametrize(
    "load",
    [data.fetch, data.load_uci, data.load_citation_graph, data.load_timeseries, data.load_text],
)
def test_an_unknown_name_is_refused_with_the_known_ones(load):
    with pytest.raises(ValueError, match=r"unknown name 'nothing'; there are: \w+"):
        load("nothing")


def test_digits_are_the_integers_of_scikit_learn_scaled():
    x, y = data.load_digits()
    assert (x.shape, x.dtype, y.shape, y.dtype) == (
        (1797, 8, 8),
        torch.float32,
        (1797,),
        torch.int64,
    )
    assert x.min() == 0 and x.max() == 1 and torch.equal(x * 16, (x * 16).round())
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


# Formats whose real files no mirror holds here: small files of the same form.


def keep(monkeypatch, root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    monkeypatch.setenv("NNLIB_DATA", str(root))
    monkeypatch.setitem(
        data.REGISTRY,
        name,
        data.Source("http://127.0.0.1:9/", "md5:" + hashlib.md5(content).hexdigest()),
    )


def test_fashion_mnist_is_read_from_its_packed_files(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    classes = np.array([9, 0, 3, 3, 1], dtype=np.uint8)
    for part, n in (("train", 5), ("t10k", 2)):
        images = struct.pack(">4i", 0x803, n, 28, 28) + pixels[:n].tobytes()
        labels = struct.pack(">2i", 0x801, n) + classes[:n].tobytes()
        keep(
            monkeypatch,
            tmp_path,
            f"fashion_mnist/{part}-images-idx3-ubyte.gz",
            gzip.compress(images),
        )
        keep(
            monkeypatch,
            tmp_path,
            f"fashion_mnist/{part}-labels-idx1-ubyte.gz",
            gzip.compress(labels),
        )
    train_x, train_y, test_x, test_y = data.load_fashion_mnist()
    assert train_x.dtype == torch.float32 and train_y.dtype == torch.int64
    np.testing.assert_allclose(train_x.numpy(), pixels / 255, rtol=1e-6)
    assert train_y.tolist() == [9, 0, 3, 3, 1] and test_y.tolist() == [9, 0]
    assert torch.equal(test_x, train_x[:2])


def cifar_batch(pixels, labels, array_function=b"cnumpy.core.multiarray\n_reconstruct\n"):
    """A batch as Python 2 pickled it for the official archive: old module names, byte strings."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    dtype += b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape) + b"\x86"
    array = array_function + b"cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(" + string(b"labels") + numbers + string(b"data") + array + b"u."


def keep_cifar(monkeypatch, root, batches):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    keep(monkeypatch, root, "cifar10/cifar-10-python.tar.gz", stream.getvalue())


def test_cifar10_batches_are_joined_in_order_whatever_the_archive_s(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    names = [
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ]
    batches = {name: cifar_batch(pixels[i], [i, 9 - i]) for i, name in enumerate(names)}
    assert pickle.loads(batches["test_batch"], encoding="bytes")[b"labels"] == [
        5,
        4,
    ]  # Python agrees on the form
    keep_cifar(monkeypatch, tmp_path, {"readme.html": b"hello"} | dict(reversed(batches.items())))
    train_x, train_y, test_x, test_y = data.load_cifar10()
    assert train_x.shape == (10, 3, 32, 32) and train_x.dtype == torch.float32
    assert train_y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test_y.tolist() == [5, 4]
    assert test_x[1, 2, 31, 0].item() == pytest.approx(pixels[5, 1, 2 * 1024 + 31 * 32] / 255)


@pytest.mark.parametrize(
    "wanted", ["posix.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.scalar"]
)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(monkeypatch, tmp_path, wanted):
    function = "c{}\n{}\n".format(*wanted.rsplit(".", 1)).encode()
    batch = cifar_batch(np.zeros((1, 3072), dtype=np.uint8), [0], array_function=function)
    keep_cifar(monkeypatch, tmp_path, {"data_batch_1": batch})
    with pytest.raises(data.DataError, match=re.escape(f"asks for {wanted};")):
        data.load_cifar10()


def test_an_object_array_in_a_graph_file_is_not_unpickled(monkeypatch, tmp_path):
    stream = io.BytesIO()
    np.savez(stream, adj_indptr=np.array([{}], dtype=object))
    keep(monkeypatch, tmp_path, "graphs/cora.npz", stream.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load_citation_graph("cora")


def test_a_graph_loses_self_links_directions_and_repeats(monkeypatch, tmp_path):
    adjacency = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    words = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=np.float32)
    arrays = {"labels": np.array([1, 0, 1, 2], dtype=np.int8)}
    for key, matrix in (("adj", adjacency), ("attr", words)):
        arrays[f"{key}_indptr"] = np.concatenate(([0], np.cumsum((matrix != 0).sum(1)))).astype(
            np.int32
        )
        arrays[f"{key}_indices"] = matrix.nonzero()[1].astype(np.int32)
        arrays[f"{key}_data"] = matrix[matrix != 0].astype(np.float32)
        arrays[f"{key}_shape"] = np.array(matrix.shape)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    keep(monkeypatch, tmp_path, "graphs/cora.npz", stream.getvalue())
    edge_index, x, y = data.load_citation_graph("cora")
    assert edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    np.testing.assert_array_equal(x.numpy(), words)
    assert y.tolist() == [1, 0, 1, 2] and y.dtype == torch.int64


# The real files.


def needs(*names):
    """Skip where `NNLIB_DATA` does not hold the files; never download in a test."""
    absent = [name for name in names if not REAL or not (Path(REAL).expanduser() / name).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"NNLIB_DATA holds no {', '.join(absent)}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in data.REGISTRY])
def test_a_real_file_has_its_registered_hash(name):
    assert data.fetch(name) == Path(REAL).expanduser().absolute() / name


@needs(
    "mnist/train-images-idx3-ubyte", "mnist/train-labels-idx1-ubyte", "mnist/t10k-images-idx3-ubyte"
)
def test_mnist_has_its_known_mean_deviation_and_counts():
    train_x, train_y, test_x, test_y = data.load_mnist()
    assert train_x.shape == (60000, 28, 28) and test_x.shape == (10000, 28, 28)
    assert train_x.dtype == torch.float32 and train_y.dtype == test_y.dtype == torch.int64
    assert train_x.min() == 0 and train_x.max() == 1
    assert round(train_x.mean().item(), 4) == 0.1307 and round(train_x.std().item(), 4) == 0.3081
    assert train_y.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert test_y[:5].tolist() == [7, 2, 1, 0, 4] and test_y.bincount()[1] == 1135


ROWS = dict(zip(data.UCI, [506, 1030, 768, 8192, 11934, 9568, 45730, 1599, 308], strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(f"uci/{name}.txt")) for name in data.UCI]
)
def test_uci_features_stand_before_the_target(name):
    x, y = data.load_uci(name)
    words = (Path(REAL).expanduser() / f"uci/{name}.txt").read_text().splitlines()[0].split()
    assert x.shape == (ROWS[name], data.UCI[name][0]) and y.shape == (ROWS[name],)
    assert x.dtype == y.dtype == torch.float64 and x.isfinite().all() and y.isfinite().all()
    assert [*x[0].tolist(), y[0].item()] == [float(word) for word in words[: x.shape[1] + 1]]


@pytest.mark.parametrize(
    "name, nodes, words, classes, links",
    [
        pytest.param("cora", 2708, 1433, 7, 5278, marks=needs("graphs/cora.npz")),
        pytest.param("citeseer", 3312, 3703, 6, 4536, marks=needs("graphs/citeseer.npz")),
    ],
)
def test_citation_graphs_agree_with_scipy(name, nodes, words, classes, links):
    from scipy import sparse

    edge_index, x, y = data.load_citation_graph(name)
    assert (
        edge_index.shape == (2, 2 * links)
        and x.shape == (nodes, words)
        and len(y.bincount()) == classes
    )
    assert edge_index.dtype == torch.int64 and x.dtype == torch.float32
    raw = np.load(Path(REAL).expanduser() / f"graphs/{name}.npz", allow_pickle=False)

    def matrix(key):
        return sparse.csr_matrix(
            (raw[f"{key}_data"], raw[f"{key}_indices"], raw[f"{key}_indptr"]), raw[f"{key}_shape"]
        )

    adjacency = (matrix("adj") + matrix("adj").T).toarray() > 0
    np.fill_diagonal(adjacency, False)
    np.testing.assert_array_equal(edge_index.numpy(), adjacency.nonzero())
    np.testing.assert_array_equal(x.numpy(), matrix("attr").toarray())
    same = (y[edge_index[0]] == y[edge_index[1]]).float().mean()
    assert same > 0.7  # papers cite papers of their class: labels and nodes are in the same order


@pytest.mark.parametrize(
    "name, steps, first, last",
    [
        pytest.param(
            "ETTh1", 17420, 5.827000141143799, 30.5310001373291, marks=needs("timeseries/ETTh1.csv")
        ),
        pytest.param(
            "ETTh2", 17420, 41.13000106811523, 38.6619987487793, marks=needs("timeseries/ETTh2.csv")
        ),
        pytest.param(
            "national_illness",
            966,
            1.22262,
            176569.0,
            marks=needs("timeseries/national_illness.csv"),
        ),
    ],
)
def test_timeseries_have_seven_columns_and_ordered_parts(name, steps, first, last):
    series = data.load_timeseries(name)
    assert series.values.shape == (steps, 7) and series.values.dtype == torch.float64
    assert (
        series.values[0, 0] == first
        and series.values[0, 6] == last
        and series.values.isfinite().all()
    )
    assert len(series.columns) == 7 and series.columns[6] == "OT" and "date" not in series.columns
    assert 0 < series.train_end < series.val_end < series.test_end <= steps


@needs("text/tinyshakespeare.txt")
def test_tiny_shakespeare_is_whole():
    text = data.load_text("tinyshakespeare")
    assert (
        len(text) == 1115394
        and len(set(text)) == 65
        and text.startswith("First Citizen:\nBefore we proceed")
    )
