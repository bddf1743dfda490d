"""One file a peer library, imported only when it is asked for: nothing here is imported by the rest of fastddpm."""
