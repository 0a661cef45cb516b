"""Learning from recordings: the one supervised loop, cloning, and the policies that come out of it."""
