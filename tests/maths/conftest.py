from double import double as double
