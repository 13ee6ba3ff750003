#pragma once
#include "on_cpu.h"
