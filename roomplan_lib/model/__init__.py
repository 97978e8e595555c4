"""The model: VGGT encoder, resampler, geometry tokens, 3D positions and the vision-language model around them."""
