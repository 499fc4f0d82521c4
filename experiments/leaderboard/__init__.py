"""All methods of the library compared on caches of the language model."""
