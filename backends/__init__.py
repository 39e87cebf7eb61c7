"""Where a graph goes when it leaves PyTorch: ONNX, ONNX Runtime, TensorRT. Imported as ``fxq.backends``.

Nothing heavy is imported here; each room loads its library inside the function that needs it.
"""
