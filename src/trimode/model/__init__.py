"""ONE transformer; who sees whom and where an adapter acts are arguments of a forward."""
