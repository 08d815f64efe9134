"""Steps that change documents or remove them."""
