#pragma once

typedef double CGFloat;
