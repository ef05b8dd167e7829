"""libstars: the C ABI and its Python binding."""
