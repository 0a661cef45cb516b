"""Tests of policies in simulators: rollouts on paired seeds, intervals, and comparisons."""
