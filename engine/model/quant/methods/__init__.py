"""Ways of finding the codes of a layer's matrices, a file each."""
