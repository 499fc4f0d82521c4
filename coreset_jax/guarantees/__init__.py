"""What can be said about the worst query: bounds from below, from above, and what is possible."""

from coreset_jax.guarantees.adversary import Adversary, adversary
from coreset_jax.guarantees.certificate import Certificate, certificate

__all__ = ["Adversary", "Certificate", "adversary", "certificate"]
