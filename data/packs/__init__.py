"""Plans packs and serves them as SFTDataset."""
