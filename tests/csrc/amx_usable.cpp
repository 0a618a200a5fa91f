// In place of csrc/cpu/program/usable.cpp where the tiles are emulated: tests/emulation.py asks whether this CPU can.
#include "cpu/amx/amx.h"

namespace resnet_fast::cpu::amx {

bool dots_usable() { return true; }

bool usable() { return true; }

const char* name() { return "emulated AMX, for tests"; }

}  // namespace resnet_fast::cpu::amx
