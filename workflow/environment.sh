# Sourced by the Makefile: takes the lock, sets up VENV if it is not complete, and puts it first on PATH.
# VENV= (empty) takes the Python environment that is active, conda's for example, as it is.

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python} ""; do
    [ -z "$python" ] || "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
[ "$python" ] || fail "Python 3.11 or newer is missing: ${PYTHON:-python3} is $(${PYTHON:-python3} -V 2>&1 | tail -1)." \
    "Install one, or say where it is: make PYTHON=/path/to/python3.12 ..."

mkdir -p _build && : > _build/.writable && rm _build/.writable || fail "Cannot write to $PWD/_build (is the disk full?)."
if [ "$NNLIB_LOCKED" != "$PWD" ]; then # a make that a test starts inside this one shares its lock
    exec 9> _build/.lock
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
        fail "Another make is at work in this folder; wait until it has finished."
    export NNLIB_LOCKED=$PWD
fi

install() {
    local log=_build/install.log
    [ "$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')" -gt 3000 ] ||
        fail "The disk is nearly full: the packages need 3 GB in $PWD/$VENV."
    say "Installing the pinned packages into $VENV: a few minutes, once (log: $log)"
    if ! grep -qsxF "book,test $inputs" "$VENV/.complete"; then
        "$python" -m venv --clear "$VENV" > "$log" 2>&1 || { tail -5 "$log" >&2; fail "Python could not create $VENV." \
            "On Debian and Ubuntu its venv module is a package of its own: apt install python3-venv"; }
    fi
    "$VENV/bin/python" -m pip install --retries 2 -c constraints.txt -e ".[$1]" > "$log" 2>&1 && return
    grep -v '^WARNING: Location' "$log" | tail -5 >&2
    grep -qi 'no space left' "$log" && fail "The disk is full; the packages need 3 GB."
    grep -q 'ResolutionImpossible' "$log" && fail "The pinned packages do not fit $("$VENV/bin/python" -V); see $log." \
        "A newer Python helps: make PYTHON=/path/to/python3.12 ..."
    grep -qiE 'connection|name resolution|unreachable|timed out|proxy' "$log" && fail "No network: pip cannot reach its package index."
    fail "The packages could not be installed; see $log."
}

if [ "$VENV" ]; then
    wanted=book,test${EXTRAS:+,$EXTRAS}
    inputs="$PWD $(cat constraints.txt pyproject.toml | cksum)"
    if ! grep -qsxF "$wanted $inputs" "$VENV/.complete"; then
        install "$wanted"
        printf '%s\n' "book,test $inputs" "$wanted $inputs" > "$VENV/.complete" # only now: a cut-off one is redone
    fi
    PATH="$(cd "$VENV/bin" && pwd):$PATH"
else
    "$python" -c 'from importlib.util import find_spec; assert find_spec("papermill") and find_spec("snakemake")' 2>/dev/null ||
        fail "VENV is empty, and $python lacks the book's packages: pip install -c constraints.txt -e '.[book,test]'"
fi

# One thread for each process, kernels of this environment only, nobody's own IPython settings, stable set order.
export PATH OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONHASHSEED=0
export JUPYTER_PREFER_ENV_PATH=1 IPYTHONDIR="$PWD/_build/ipython"

peers() { # libraries that cannot live beside the book's own packages get an environment each
    local list home
    export SKLEARN_ALLOW_DEPRECATED_SKLEARN_PACKAGE_INSTALL=True # old peers ask for scikit-learn by this name
    for list in benchmarks/peers/*.txt; do
        home=.venv-peers/$(basename "$list" .txt)
        cmp -s "$list" "$home/.complete" && continue
        say "Installing a peer of the benchmarks into $home"
        "$python" -m venv --clear "$home" && "$home/bin/python" -m pip install -q -r "$list" > _build/install.log 2>&1 ||
            fail "The peer could not be installed; see _build/install.log."
        cp "$list" "$home/.complete"
    done
}

render() { # [--committed]: the pages, unless they are there already
    local state
    state=$(python workflow/inputs.py --rendered "$@") || exit 1
    if [ -f _build/html/index.html ] && [ "$(cat _build/rendered 2>/dev/null)" = "$state" ]; then
        say "The pages are up to date: _build/html/index.html"
        return
    fi
    rm -f _build/rendered
    python workflow/pages.py "$@" || exit 1
    jupyter-book build _build/source --config _config.yml --toc _toc.yml --path-output . -W --keep-going || exit 1
    printf '%s\n' "$state" > _build/rendered
    say "The pages: _build/html/index.html"
}
