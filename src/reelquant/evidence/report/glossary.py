"""Words of the report that not every reader knows, in plain words."""

from __future__ import annotations

WORDS: dict[str, str] = {
    "noise floor": "the float pipeline run again, computed a little differently. What it changes is rounding and chance; a change of "
    "the quantized clips that is no larger cannot be blamed on quantization.",
    "within": "no worse than the noise floor: the figure lies inside of the limit beside it, which is the far end of the floor's interval.",
    "near-lossless": "every figure that has a noise floor is within it.",
    "gate": "a list of limits; the pipeline passes if no figure lies outside of its limit.",
    "margin": "how far a figure is inside of its limit, in its own unit; negative outside.",
    "simulated": "a layer is stored in few bits, and float arithmetic stands in for its few-bit products on this machine. The clips show "
    "what the recipe does to quality; times say nothing about its speed.",
    "same noise": "both pipelines start from the same random numbers, so their clips would be equal if nothing else differed.",
    "95 % interval": "where the mean would lie for 95 of 100 draws of as many clips.",
    "PSNR": "closeness of pixels in decibels: 20 is clearly different, 30 similar, 40 hard to tell apart, 100 equal.",
    "SSIM": "similarity of structure in small windows, 1 for equal frames.",
    "LPIPS": "distance of frames as a vision network sees them, 0 for equal frames.",
    "FVD, FID, KID": "distances between two sets of clips or frames as a network sees them. They need hundreds of clips.",
}

KERNELS: dict[str, str] = {  # what computes layers: reelquant.kernels
    "int8 tiles": "8-bit integers, multiplied a tile of 16 rows and 16 columns at a time; exact, for small layers on processors with AMX",
    "int8 quads": "8-bit integers, multiplied four at a time; exact, for small layers on processors with 8-bit products",
    "onednn int8": "8-bit integers, multiplied by the library oneDNN",
    "onednn int8 from int4": "4-bit weights, widened and multiplied as 8-bit integers by the library oneDNN",
    "int16 pairs": "few-bit integers, widened to 16 bits and multiplied two at a time; exact, for processors without 8-bit products",
    "int16 groups": "few-bit integers with a scale for each group of channels, multiplied as 16-bit integers; exact",
    "float products": "weights stored in few bits, multiplied as floats",
    "reference": "plain float arithmetic of torch",
    "triton int8": "8-bit integers, multiplied on the GPU",
    "triton int8 from int4": "4-bit weights, widened and multiplied as 8-bit integers on the GPU",
    "triton int8 convolution": "8-bit integers, multiplied on the GPU",
    "triton int8 from groups": "few-bit integers with a scale for each group of channels, multiplied as 8-bit integers on the GPU",
    "triton e4m3": "8-bit floats, multiplied on the GPU",
    "triton e4m3 convolution": "8-bit floats, multiplied on the GPU",
    "triton float products": "weights stored in few bits, multiplied as floats on the GPU",
    "torch int8": "8-bit integers, multiplied by torch on the GPU",
    "torch e4m3": "8-bit floats, multiplied by torch on the GPU",
    "torch float products": "weights stored in few bits, multiplied as floats on the GPU",
}
