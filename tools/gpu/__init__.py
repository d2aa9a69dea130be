# SPDX-License-Identifier: MIT
"""An Intel gen9 GPU in software, behind vfio-user: ``python -m tools.gpu --socket PATH``. README.md tells more.

Only the standard library is imported, so that any Python from 3.11 on can run it.

=================== ==================================================================================
``cli``             the command line, and the loop that waits for the client, tests and time
``errors``          why the program cannot start; why a request is refused
``wire``            vfio-user's messages, and a bounded connection that carries them
``server``          checks each message, and does it or refuses it
``dma``             the client's memory
``irq``             the client's eventfds: INTx and MSI
``pci``             the configuration space
``gpu``             the function that is made of all of these and the following
``registers``       the table of registers with side effects, and the code that looks at them
``mmio``            the registers' memory, and what the side effects are
``gt_irq``          the interrupt registers
``translate``       GGTT and PPGTT walks
``access``          an engine's accesses to memory, through those
``engine``          execution lists: ports, preemption, context status
``context``         a context's image
``commands``        the command interpreter
``command``         a command that is executed
``blit``            the 2D commands' operands
``clock``           timestamps
``record``          what was executed, with which addresses
``misbehaviour``    what the GPU is told to do wrong
``protocol``        the control protocol's limits
``control_server``  its answers
``control``         its client, for tests
=================== ==================================================================================
"""
