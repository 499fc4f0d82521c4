"""The names that results have in programs that ``jax.export`` writes to disk.

A program that was exported and serialized takes and returns them where this package is imported.
"""

import json

from jax import export

from coreset_jax._src.core.coreset import Coreset, SignedCoreset
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.packed import PackedCoreset
from coreset_jax._src.geometry.standardize import Calibration, Standardization
from coreset_jax._src.stream.sketch import Ledger, Pairs, Sketch
from coreset_jax._src.stream.summary import Summary
from coreset_jax.compression import Certified
from coreset_jax.guarantees.adversary import Adversary
from coreset_jax.guarantees.certificate import Certificate
from coreset_jax.queries import Observed
from coreset_jax.streaming import StreamError, StreamState

for each in (
    Adversary,
    Calibration,
    Certificate,
    Certified,
    Coreset,
    Info,
    Ledger,
    Observed,
    Pairs,
    SignedCoreset,
    Sketch,
    Standardization,
    StreamError,
    StreamState,
    Summary,
):
    # Files have these names in them: a class that is renamed keeps its own.
    export.register_namedtuple_serialization(each, serialized_name=f"coreset_jax.{each.__name__}")

export.register_pytree_node_serialization(
    PackedCoreset,
    serialized_name="coreset_jax.PackedCoreset",
    serialize_auxdata=lambda options: json.dumps(options).encode(),
    deserialize_auxdata=lambda serialized: tuple(json.loads(serialized)),
)
