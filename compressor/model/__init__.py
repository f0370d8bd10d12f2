"""Names and roles of checkpoint tensors; loading models."""
