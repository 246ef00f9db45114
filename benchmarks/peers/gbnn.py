"""Worker: the authors' regressor. First line out: its test error; then one `done` for each `run`."""

import json
import sys
import warnings

# A script's own folder stands first on the path, and this script has the name of the library that it imports.
sys.path.pop(0)

import numpy as np
from gbnn import GNEGNERegressor

warnings.simplefilter("ignore")  # its blocks warn that their iterations are over
path, block_size = sys.argv[1], int(sys.argv[2])
a, ya, b, yb = np.load(path).values()
model = GNEGNERegressor(48 * block_size, block_size, 0.1, max_iter=60, random_state=0)
model.fit(a, ya)
error = np.sqrt(np.mean((model.predict(b) - yb) ** 2))
print(json.dumps({"checksum": float(error)}), flush=True)
for _ in sys.stdin:
    model.fit(a, ya)
    print("done", flush=True)
