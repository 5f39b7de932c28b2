"""The model `smollm2-hybrid-draft` of mambify: data only."""
