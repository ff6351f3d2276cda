"""The linear map from a bias to what the head reads: pulled back, pushed forward, and compared with plain autograd."""
