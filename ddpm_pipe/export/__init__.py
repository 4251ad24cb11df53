"""Models outside of Python: a network as ONNX, and a page that draws images with it in a browser."""
