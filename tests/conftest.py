import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small run fifty times slower on threads that wait
