"""Look inside a network: its neighbours, their pictures and statistics, and its export to ONNX."""
