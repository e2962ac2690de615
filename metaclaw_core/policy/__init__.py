"""The policy server of rl mode: it answers the agent's requests from the weights being trained, with exact tokens."""
