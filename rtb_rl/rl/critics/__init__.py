"""What an action is worth: critics, IQL, and the Gaussian policy that IQL takes from one."""
