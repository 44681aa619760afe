"""The frozen networks (VAE, umT5, DINOv2, face networks), LoRA files, and any file of weights.
May import rope and support."""
