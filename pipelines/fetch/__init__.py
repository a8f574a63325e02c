"""From candidates to pairs: guard, client, robots.txt, decoder processes, shards."""
