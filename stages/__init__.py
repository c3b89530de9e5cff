"""The pipeline's stages, one file each: the only code that knows params, pipeline files, Hugging Face and clocks."""
