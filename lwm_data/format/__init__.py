"""The wall between the two packages: token ids, examples, packed rows, shards, and the words around them."""
