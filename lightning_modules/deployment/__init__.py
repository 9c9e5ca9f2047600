"""What a student needs to leave this package: one graph from waveforms to states, ONNX files, heads, streaming."""
