// recurrent_walk over cells that use everything a cell may have; test_sanitizers.py prints them.
#define GK_OTHER_CELLS
#include "user_cells.gen.h"

#include "recurrent_walk.cpp"
