"""The methods of finding a circuit, each a class of its options with `find`; `registry` knows them by name."""
