"""The model `smollm2-hybrid` of mambify: data only."""
