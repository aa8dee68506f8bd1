"""Usage: how much each owner's expert took part in answers, in a ledger that owners verify."""
