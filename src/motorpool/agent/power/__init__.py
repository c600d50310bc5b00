"""What the computer draws: counters of the processor, the vehicle's own signal, or a model; and a permit's watts in
threads and duty.

``rapl`` reads Linux's energy counters, ``model`` calibrates and plans, ``meter`` chooses the source of each moment.
"""
