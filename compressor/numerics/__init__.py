"""Pure tensor functions: number formats, packing, ranges, scale search. Torch only, any device, no state."""
