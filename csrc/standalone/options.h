// What the program is asked to do.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/params.h"

namespace lnc::standalone {

constexpr const char* kUsage =
    "usage: layernorm_standalone --rows R --cols C [option ...]\n"
    "  --dtype f32|f16|bf16|f64          of input, residual and, unless told otherwise, the rest (f32)\n"
    "  --param-dtype TYPE                of weight and bias: the dtype, or what it accumulates in\n"
    "  --output-dtype TYPE               of the output and its gradient: likewise, as under autocast\n"
    "  --direction forward|backward      (forward)\n"
    "  --norm layer|rms                  (layer)\n"
    "  --residual  --no-weight  --no-bias\n"
    "  --misalign ELEMENTS               begin so far beyond a multiple of 16 bytes (0)\n"
    "  --offset MEAN                     mean of the input, its standard deviation being 1 (0)\n"
    "  --tier auto|NAME                  (auto: as the extension chooses)\n"
    "  --repeats K                       timed runs, of which the median is printed (1)\n"
    "  --seed S                          (0)\n"
    "  --list-tiers                      the tiers of both directions for this dtype, and end\n"
    "  --roof                            time two kernels that only move the same bytes, too\n"
    "Exit status: 0 right, 1 wrong, 2 not run.\n";

struct Options {
  int64_t rows = 0, cols = 0;
  DType dtype = DType::f32, param_dtype = DType::f32, output_dtype = DType::f32;
  Norm norm = Norm::layer;
  bool backward = false, residual = false, weight = true, bias = true, list_tiers = false, roof = false;
  int64_t misalign = 0, repeats = 1;
  uint64_t seed = 0;
  double offset = 0;
  std::string tier;  // empty for auto
};

[[noreturn]] inline void refuse(const std::string& why) {
  std::fprintf(stderr, "layernorm_standalone: %s\n", why.c_str());
  std::exit(2);
}

inline const char* name_of(DType t) {
  return t == DType::f32 ? "f32" : t == DType::f16 ? "f16" : t == DType::bf16 ? "bf16" : "f64";
}

inline DType dtype_named(const std::string& option, const std::string& name) {
  for (DType t : {DType::f32, DType::f16, DType::bf16, DType::f64})
    if (name == name_of(t)) return t;
  refuse(option + " is " + name + ", expected f32, f16, bf16 or f64");
}

inline Options parse(int argc, char** argv) {
  Options o;
  std::string param_dtype, output_dtype;
  int i = 1;
  auto value = [&] {
    if (i + 1 >= argc) refuse(std::string(argv[i]) + " needs a value");
    return std::string(argv[++i]);
  };
  auto number = [&](int64_t least) {
    const std::string option = argv[i], text = value();
    char* end;
    const int64_t n = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || n < least)
      refuse(option + " is " + text + ", expected a whole number from " + std::to_string(least) + " on");
    return n;
  };
  auto choice = [&](const std::string& first, const std::string& second) {
    const std::string option = argv[i], text = value();
    if (text != first && text != second) refuse(option + " is " + text + ", expected " + first + " or " + second);
    return text == second;
  };
  for (; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--rows") {
      o.rows = number(1);
    } else if (a == "--cols") {
      o.cols = number(1);
    } else if (a == "--dtype") {
      o.dtype = dtype_named(a, value());
    } else if (a == "--param-dtype") {
      param_dtype = value();
    } else if (a == "--output-dtype") {
      output_dtype = value();
    } else if (a == "--direction") {
      o.backward = choice("forward", "backward");
    } else if (a == "--norm") {
      o.norm = choice("layer", "rms") ? Norm::rms : Norm::layer;
    } else if (a == "--residual") {
      o.residual = true;
    } else if (a == "--no-weight") {
      o.weight = false;
    } else if (a == "--no-bias") {
      o.bias = false;
    } else if (a == "--misalign") {
      o.misalign = number(0);
    } else if (a == "--offset") {
      o.offset = std::atof(value().c_str());
    } else if (a == "--tier") {
      o.tier = value();
    } else if (a == "--repeats") {
      o.repeats = number(1);
    } else if (a == "--seed") {
      o.seed = static_cast<uint64_t>(number(0));
    } else if (a == "--list-tiers") {
      o.list_tiers = true;
    } else if (a == "--roof") {
      o.roof = true;
    } else if (a == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else {
      refuse("unknown option " + a + "; --help lists them");
    }
  }
  if (o.tier == "auto") o.tier.clear();
  if (!o.list_tiers && (!o.rows || !o.cols)) refuse("--rows and --cols are needed; --help lists the options");
  o.param_dtype = param_dtype.empty() ? o.dtype : dtype_named("--param-dtype", param_dtype);
  o.output_dtype = output_dtype.empty() ? o.dtype : dtype_named("--output-dtype", output_dtype);
  const DType wide = accumulate_type(o.dtype);
  if (o.param_dtype != o.dtype && o.param_dtype != wide)
    refuse(std::string("--param-dtype is ") + name_of(o.param_dtype) + ", expected " + name_of(o.dtype) + " or " +
           name_of(wide));
  if (o.output_dtype != o.dtype && (o.output_dtype != wide || o.param_dtype != wide))
    refuse(std::string("--output-dtype is ") + name_of(o.output_dtype) + ", expected " + name_of(o.dtype) + ", or " +
           name_of(wide) + " where --param-dtype is too");
  return o;
}

}  // namespace lnc::standalone
