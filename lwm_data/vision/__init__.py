"""Images and videos as VQGAN codes, and codes as images. Only its modules that compute import torch."""
