"""A page in the browser on which edits are tried by hand: `p2p web`."""
