// Which of the planted faults is active; 0: none.
#pragma once
extern "C" int lnc_host_mutant;
