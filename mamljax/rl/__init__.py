"""Reinforcement learning: environments, trajectories, and policies that adapt in a few gradient steps."""
