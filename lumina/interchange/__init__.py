"""Models and training states as others read them: canonical names, safetensors, and what the other backend wrote."""
